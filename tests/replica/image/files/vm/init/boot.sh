#!/bin/sh
# Starts what a virtual machine's init would: host keys, access, the mirror, sshd.
mkdir -p /run/sshd /home/ubuntu/.ssh
for kind in ed25519 ecdsa; do
	key=/etc/ssh/ssh_host_${kind}_key
	[ -s "$key" ] || ssh-keygen -q -t "$kind" -N '' -f "$key"
done
keys=/home/ubuntu/.ssh/authorized_keys
if [ -n "${REPLICA_KEY:-}" ] && ! grep -qsF "$REPLICA_KEY" "$keys"; then
	echo "$REPLICA_KEY" >>"$keys"
fi
chmod 0700 /home/ubuntu/.ssh
chmod 0600 "$keys"
chown -R ubuntu:ubuntu /home/ubuntu/.ssh
chown ubuntu:ubuntu /data
echo "ubuntu:$REPLICA_PASSWORD" | chpasswd
/init/platform/python/bin/python -I /init/mirror.py >>/var/log/mirror.log 2>&1 &
exec /usr/sbin/sshd -D -E /var/log/sshd.log
