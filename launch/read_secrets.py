"""Run a command with keys from Secret Manager in its environment.

  AVOCADO_SECRETS=PROJECT/NAME,PROJECT/NAME python launch/read_secrets.py COMMAND...

The newest version of each secret becomes the environment variable of its name. Neither a command line nor a manifest
contains it. The identity of the host needs roles/secretmanager.secretAccessor on each secret. Status where a secret
cannot be read: 2 if there is no access, 1 if a retry may help.
"""

import base64
import os
import sys

import google.auth
from google.auth.exceptions import GoogleAuthError
from google.auth.transport.requests import AuthorizedSession
from requests.exceptions import RequestException

URL = "https://secretmanager.googleapis.com/v1/projects/{}/secrets/{}/versions/latest:access"


def main(command: list[str]) -> int:
    """Read the secrets and replace this process by the command. Returns only on a failure."""
    try:
        credentials, _ = google.auth.default(scopes=["https://www.googleapis.com/auth/cloud-platform"])
        session = AuthorizedSession(credentials)
        for secret in os.environ["AVOCADO_SECRETS"].split(","):
            project, name = secret.split("/")
            answer = session.get(URL.format(project, name), timeout=60)
            if answer.status_code in (401, 403, 404):
                needs = "create it, and grant roles/secretmanager.secretAccessor on it to the hosts' service account"
                return _fail(f"{secret}: status {answer.status_code} of Secret Manager; {needs}", 2)
            answer.raise_for_status()
            os.environ[name] = base64.b64decode(answer.json()["payload"]["data"]).decode().strip()
    except (GoogleAuthError, RequestException) as error:
        return _fail(str(error), 1)
    os.execvp(command[0], command)


def _fail(text: str, status: int) -> int:
    print(f"launch: {text}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
