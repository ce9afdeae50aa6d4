"""Numbers from two label maps: conventions, overlap, surfaces, lesions, calibration."""
