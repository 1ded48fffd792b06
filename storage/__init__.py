"""Study data on disk: records, the Optuna storage that holds them, and the files made from them."""
