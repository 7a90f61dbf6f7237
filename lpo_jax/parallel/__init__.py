"""Devices and hosts: the mesh of a run, the rules that place arrays on it, and communication between processes.

Nothing here knows a model: the choice of a mesh takes head counts and sizes, and arrays are placed by axis names.
"""
