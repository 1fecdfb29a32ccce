"""The version of peerd, imported by everything that has to say it."""

VERSION = "0.1.0"
