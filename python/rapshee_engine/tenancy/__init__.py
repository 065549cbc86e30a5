"""Who may ask for how much. Knows neither engine nor server."""
