"""The page of `arm-hf app`: `page` is the page itself, `work` what happens behind it, `guard` what keeps it safe."""
