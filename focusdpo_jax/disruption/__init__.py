"""Instance disruption: rejected pictures by drawing the subjects of good ones anew."""
