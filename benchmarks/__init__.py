"""Measurements of this project and of what people would use instead."""
