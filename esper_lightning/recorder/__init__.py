"""``FlightRecorder`` and all that serves it: evidence of a run, whichever way the run dies."""
