/*
 * cmd.h - the subcommands of `flexkv`, one file each; main.c finds them by name.
 *
 * argv[0] is the subcommand's name. They return the exit status: 0, 1 failed, 2 bad usage;
 * serve also 3, the address is in use.
 */
#ifndef FK_CLI_CMD_H
#define FK_CLI_CMD_H

int cmd_bench(int argc, char **argv);
int cmd_cluster(int argc, char **argv);
int cmd_config(int argc, char **argv);
int cmd_events(int argc, char **argv);
int cmd_fsck(int argc, char **argv);
int cmd_replay(int argc, char **argv);
int cmd_serve(int argc, char **argv);
int cmd_status(int argc, char **argv);
int cmd_top(int argc, char **argv);

#endif
