"""What every job stands on: run folders, spec strings, processes and progress. It knows numbers and files, no model."""
