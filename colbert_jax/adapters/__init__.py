"""This library inside others: a module for each, which needs its package and imports it."""
