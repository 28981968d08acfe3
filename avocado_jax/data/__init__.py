"""From clips to rows: numpy only, no device code, so that input workers stay small."""
