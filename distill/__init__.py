"""What trains the small bundled models: procedural talking cartoons, speech, clips. Run from the repository's root."""
