"""Pages about the library, and the script that draws one of their pictures."""
