"""What a claim rests on: protocols written down before they are measured, and the verdicts that follow from them."""
