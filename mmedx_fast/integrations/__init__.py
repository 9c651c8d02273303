"""Our ops inside other trainers; each module imports its trainer only when used."""
