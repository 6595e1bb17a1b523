"""What several stages share, or what is too long for one: no stage itself."""
