"""Rows of any format to the tokens that are trained, and everything that can be said about them beforehand."""
