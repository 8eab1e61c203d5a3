"""Other people's classes running on pyflow's ops; each module imports its own package, none is imported here."""
