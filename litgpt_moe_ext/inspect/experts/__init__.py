"""What the experts of a trained model do."""
