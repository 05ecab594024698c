/* notify.c - see notify.h: one datagram to the unix socket that $NOTIFY_SOCKET names. */
#include "notify.h"

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include "base/log.h"
#include "base/util.h"

void notify_manager(const char *state)
{
    const char *path = getenv("NOTIFY_SOCKET");
    struct sockaddr_un to = { .sun_family = AF_UNIX };
    size_t len = path ? strlen(path) : 0;

    if (len == 0)
        return;
    if ((*path != '/' && *path != '@') || len >= sizeof(to.sun_path)) {
        fk_warn("NOTIFY_SOCKET %s is no address of a unix socket; nobody is notified", path);
        return;
    }
    memcpy(to.sun_path, path, len);
    if (*path == '@')
        to.sun_path[0] = '\0';           /* the abstract namespace */
    fk_autoclose int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    struct timeval patience = { .tv_sec = 2 };
    if (fd < 0 || setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof(patience)) ||
        sendto(fd, state, strlen(state), MSG_NOSIGNAL, (struct sockaddr *)&to,
               (socklen_t)(offsetof(struct sockaddr_un, sun_path) + len)) < 0)
        fk_warn("NOTIFY_SOCKET %s: %s", path, strerror(errno));
}
