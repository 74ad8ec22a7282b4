"""``FlightRecorder`` and what serves it: evidence of a run, for every way in which it can die."""
