"""What crosses a process border: frozen values, and nothing that behaves. No ray and no torch at import."""
