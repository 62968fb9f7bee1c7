"""Readers of the file formats that `nas.data.load_data` accepts: one file per format, each returning a `raw.Raw`.

A reader turns files into numbers and labels, nothing more: splitting, resizing and normalising are `nas.data`'s, for every
format alike. Nothing here unpickles anything. Start with `raw.Raw`, then `known.py` for the sets with a name.
"""
