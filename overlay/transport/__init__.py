"""The only files of the overlay that touch sockets."""
