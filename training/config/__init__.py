"""Every option there is: frozen dataclasses, recipe files, and what runs of older versions
meant."""
