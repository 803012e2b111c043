"""The processes of a deployment: supervisor, frontend and ranks. Started by module name, never imported by clients."""
