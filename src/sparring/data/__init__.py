"""Rows of any accepted form -> examples -> token ids, and the tables that hold them."""
