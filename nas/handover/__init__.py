"""What was found becomes stock models: exported, fine-tuned, booked."""
