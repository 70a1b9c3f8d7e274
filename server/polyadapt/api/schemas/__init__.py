"""The wire formats: what comes in is checked here, what goes out is declared here."""
