"""torch_mlu.utils.gpu_migration: importing `migration` from it switches the migration on."""
