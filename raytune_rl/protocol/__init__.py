"""Values that cross a process border: frozen, and nothing that behaves. No ray and no torch at import."""
