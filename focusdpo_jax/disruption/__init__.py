"""Instance disruption: rejected images by drawing the subjects of good ones anew."""
