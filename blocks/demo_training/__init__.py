"""How the demo model is made: its corpus, its tokenizer and its training. No part of the daemon imports this."""
