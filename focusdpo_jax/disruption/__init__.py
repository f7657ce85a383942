"""Instance disruption: makes rejected images by inpainting the subjects of chosen images."""
