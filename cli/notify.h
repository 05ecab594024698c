/* notify.h - tells the service manager how a daemon is (sd_notify(3), without libsystemd). */
#ifndef FK_CLI_NOTIFY_H
#define FK_CLI_NOTIFY_H

/* "READY=1", "STOPPING=1", ...; does nothing where nobody asked ($NOTIFY_SOCKET). */
void notify_manager(const char *state);

#endif
