"""The miniature: how the small trained checkpoint in the box was made, and how well it draws."""
