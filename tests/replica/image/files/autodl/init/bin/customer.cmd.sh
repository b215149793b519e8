#!/bin/bash
if [ -f /etc/autodl.sh ]; then
	bash /etc/autodl.sh
fi
