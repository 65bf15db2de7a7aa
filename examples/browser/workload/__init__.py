"""What runs in the VM: Chromium, and an HTTP server that does with it what the plugin's actions say.

Standard library alone, so that the image needs Debian's Python and nothing else.
"""
