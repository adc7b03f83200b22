"""The tabletop world: scenes drawn from a seed, their true captions, and a ray tracer that knows every mask and depth."""
