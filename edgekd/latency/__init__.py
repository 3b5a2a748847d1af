"""What a model takes on a device without running it there: a database of measurements, a predictor trained on it, rooflines and quoted figures."""
