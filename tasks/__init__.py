"""seqio tasks that come with vikhr-t5. Import the module that you need (`tasks.demo`): this file imports nothing."""

# Another installed package may be called `tasks` too; by this name the cache tells which one it has found.
__vikhr_t5__ = True
