"""All that starts work: definitions, the command line, jobs, schedules and sensors."""
