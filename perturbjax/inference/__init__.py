"""How a delta is found: by projected gradient steps (`pgd`)."""
