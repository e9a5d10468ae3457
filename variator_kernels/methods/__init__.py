"""What is put at a site: one folder a method."""
