"""The workload of the VM: Chromium, and an HTTP server that performs the plugin's actions with it.

It uses only the standard library, so that the image needs nothing but Debian's Python.
"""
