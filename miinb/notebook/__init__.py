"""The notebook's face: magics, panels, cards and live text."""
