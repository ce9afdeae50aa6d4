"""Using trained models: segmenting scans, bringing published weights in, taking models out."""
