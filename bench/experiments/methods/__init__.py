"""The methods as plain torch modules around a frozen model, each with a writer of its files.

Written from the papers' equations, as directly as they can be said; nothing of the server is used.
"""
