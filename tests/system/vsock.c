/*
 * A program of the guest's for tests/system/test_vsock.py.
 *   vsock echo PORT    takes connections to PORT, one after the other, and sends back what each brings
 *   vsock talk PORT    connects to PORT of the host, sends its input and writes what comes back
 */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <unistd.h>

static char buffer[65536];

static void send_all(int fd, const char *bytes, ssize_t count)
{
    while (count > 0) {
        ssize_t done = write(fd, bytes, count);
        if (done <= 0) {
            perror("write");
            exit(1);
        }
        bytes += done;
        count -= done;
    }
}

static int echo(int listener)
{
    for (;;) {
        ssize_t count;
        int fd = accept(listener, 0, 0);
        if (fd < 0)
            return perror("accept"), 1;
        while ((count = read(fd, buffer, sizeof buffer)) > 0)
            send_all(fd, buffer, count);
        close(fd);
    }
}

static int talk(int fd)
{
    struct pollfd list[2] = {{0, POLLIN, 0}, {fd, POLLIN, 0}};
    for (;;) {
        ssize_t count;
        if (poll(list, 2, -1) < 0)
            return perror("poll"), 1;
        if (list[0].revents) {
            count = read(0, buffer, sizeof buffer);
            if (count > 0)
                send_all(fd, buffer, count);
            else {
                shutdown(fd, SHUT_WR);
                list[0].fd = -1;
            }
        }
        if (list[1].revents) {
            count = read(fd, buffer, sizeof buffer);
            if (count <= 0)
                return count < 0;
            send_all(1, buffer, count);
        }
    }
}

int main(int argc, char **argv)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK};
    int fd = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (fd < 0 || argc != 3)
        return perror("socket"), 1;
    address.svm_port = atoi(argv[2]);
    if (strcmp(argv[1], "talk") == 0) {
        address.svm_cid = VMADDR_CID_HOST;
        if (connect(fd, (struct sockaddr *)&address, sizeof address) < 0)
            return perror("connect"), 1;
        return talk(fd);
    }
    address.svm_cid = VMADDR_CID_ANY;
    if (bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 5) < 0)
        return perror("listen"), 1;
    puts("ready");
    fflush(stdout);
    return echo(fd);
}
