#!/bin/bash
# PID 1. Ends when supervisord ends, and with it the host.
# shellcheck source=/dev/null
source /etc/profile
bash /init/bin/access.sh
bash /init/bin/customer.cmd.sh >/tmp/autodl.sh.log 2>&1 &
/init/supervisor/supervisord -n -c /init/supervisor/supervisor.ini
