"""Step-aware neural architecture search for diffusion models: the engine. It knows no UNet and no FID."""
