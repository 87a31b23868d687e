"""The actors of one role as one object."""
